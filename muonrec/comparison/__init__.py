"""Does one optimizer pay over another? The protocol, the queue of runs, the search for rates and the answer."""
