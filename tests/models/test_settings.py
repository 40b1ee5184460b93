"""Settings that no model can be built with are refused where they are read, by name."""

import pytest

from muonrec.config import parse_config
from muonrec.models import MODELS


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "caser", "hstu", "tiger"])
def test_widths_counts_and_shares_out_of_range_are_refused(name):
    config_class = MODELS[name].config_class
    for setting, field in config_class.model_fields.items():
        if isinstance(field.default, bool) or not isinstance(field.default, int | float):
            continue
        for value in [0] if isinstance(field.default, int) else [-0.1, 1.0]:
            with pytest.raises(ValueError, match=rf"\n  {setting}: Input should be .* \(found {value}\)"):
                parse_config(config_class, {setting: value}, source="here")


def test_a_window_longer_than_every_history_is_refused():
    config_class = MODELS["caser"].config_class
    assert parse_config(config_class, {"window": 5, "max_length": 5}, source="here").window == 5
    with pytest.raises(
        ValueError, match=r"window 6 is longer than any history, which max_length 5 cuts: .* lower window"
    ):
        parse_config(config_class, {"window": 6, "max_length": 5}, source="here")
