"""The stages data, train, eval and compare; they meet through files only."""
