"""Options of models that are on or off, at every door they come in by."""

import pytest
import timm

import exit_plugins  # noqa: F401  registers the models


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("dynperceiver_test", "fkt"),
        ("dynperceiver_test", "features_before_z2x"),
        ("tsm_dynperceiver_test", "online"),
        ("tsm_dynperceiver_test", "x2z"),
        ("dynperceiver", "z2x"),
        ("dvt_test", "feature_reuse"),
        ("chase_test", "cam"),
        ("cascade_test", "average"),
    ],
)
def test_switches_given_as_texts_are_refused(name, switch):
    for text in ("no", "false", ""):
        with pytest.raises(ValueError, match=f"{switch} is True or False, got {text!r}"):
            timm.create_model(name, **{switch: text})
    timm.create_model(name, **{switch: False})
