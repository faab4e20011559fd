"""Polish: scales trained against the original model bring a packed one closer, and nothing else of it moves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import Pico, make_tokenizer, random_text
from made_up import matrices_of
from numpy.typing import NDArray

from packager.forms.blocks import BlockForm
from packager.forms.registry import Form, parse_form
from packager.forms.split import SplitForm
from packager.progress import Silent
from packager.scoring.polish import Polish, polish
from packager.scoring.rounding import feedback, packed, round_to
from packager.source.unit_weights import Source, find_sources

Arrays = dict[str, NDArray[np.generic]]


def rounded(source: Source, form: Form, model: torch.nn.Module) -> Arrays:
    assert isinstance(form, BlockForm | SplitForm)
    (rounded,) = round_to(source.weight(model), [form], feedback(torch.eye(source.unit.cols)))
    return packed(rounded, form)


def run(taught: Pico, label: str, seconds: float) -> tuple[Polish, list[Source], dict[str, Form]]:
    original = taught.model
    sources = find_sources(matrices_of(original), original)
    forms = {source.unit.name: parse_form(label if source.unit.kind == "linear" else "f32") for source in sources}
    small = copy.deepcopy(original)
    with torch.no_grad():
        for source in sources:
            form, unit = forms[source.unit.name], source.unit
            if unit.kind == "linear":
                source.weight(small).copy_(
                    torch.from_numpy(form.dequantize(rounded(source, form, original), unit.rows, unit.cols))
                )
    ids = torch.tensor(make_tokenizer()(random_text(2, 6000), verbose=False)["input_ids"])
    windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    done = polish(
        original,
        small,
        sources,
        forms,
        lambda source, form: rounded(source, form, original),
        windows=windows[4:],
        heldout=windows[:4],
        seconds=seconds,
        rounds_inputs=True,
        progress=Silent(),
    )
    return done, sources, forms


@pytest.mark.parametrize("label", ["q2g32", "q4g64z", "q6g32"])
def test_polished_scales_bring_the_model_closer(taught: Pico, label: str) -> None:
    before = {name: parameter.clone() for name, parameter in taught.model.named_parameters()}
    done, sources, forms = run(taught, label, 4)
    assert done.steps > 5
    assert 0 < done.after_nats < done.before_nats
    linear = [source for source in sources if source.unit.kind == "linear"]
    assert set(done.scales) == {source.unit.name for source in linear}
    for source in linear:
        old = rounded(source, forms[source.unit.name], taught.model)["scales"]
        new = done.scales[source.unit.name]
        assert new.shape == old.shape
        assert new.dtype == np.float32
        assert bool(np.isfinite(new).all())
        assert bool((new != old).any())
    assert all(torch.equal(parameter, before[name]) for name, parameter in taught.model.named_parameters())


def test_polish_that_does_not_help_is_thrown_away(taught: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packager.scoring.polish._RATE", 3.0)
    done, _, _ = run(taught, "q8g32", 0.5)
    assert done.scales == {}
    assert done.after_nats == done.before_nats
