"""What the two methods promise of a unit before anything is computed."""

from __future__ import annotations

import pytest

from packager.errors import UsageError
from packager.forms.kinds import KINDS
from packager.scoremap.model import Unit
from packager.scoremap.settings import QUICK_ACIP, AcipSettings, ScoreSettings
from packager.scoring.acip.method import AcipMethod
from packager.scoring.curvature.method import CurvatureMethod
from packager.scoring.method import labels_tried, large_unit, rounded_blocks
from packager.scoring.score import method_of

UNITS = [large_unit(kind) for kind in KINDS]


def blocks(settings: ScoreSettings, units: list[Unit] = UNITS) -> tuple[int, ...]:
    return rounded_blocks(method_of(settings), units, settings.kernels)


@pytest.mark.parametrize("acip", [None, QUICK_ACIP])
def test_the_settings_choose_the_method(acip: AcipSettings | None) -> None:
    assert isinstance(method_of(ScoreSettings(acip=acip)), AcipMethod if acip else CurvatureMethod)


def test_depth_is_told_apart_where_it_may_be() -> None:
    assert method_of(ScoreSettings()).bands == 3
    assert method_of(ScoreSettings(quick=True)).bands == 1
    assert method_of(ScoreSettings(acip=AcipSettings())).bands == 1


def test_only_blocks_that_a_tried_form_rounds_by_are_measured() -> None:
    assert blocks(ScoreSettings()) == (32, 64, 128)
    assert blocks(ScoreSettings(quick=True)) == (64,)
    assert blocks(ScoreSettings(acip=QUICK_ACIP), [large_unit("linear")]) == (32, 64)
    narrow = Unit(name="narrow", kind="linear", rows=64, cols=64, matrix="narrow")
    assert blocks(ScoreSettings(), [narrow]) == (32, 64)
    assert blocks(ScoreSettings(float_only=True)) == ()
    assert blocks(ScoreSettings(provider="cuda")) == ()


@pytest.mark.parametrize("settings", [ScoreSettings(), ScoreSettings(quick=True), ScoreSettings(acip=QUICK_ACIP)])
def test_every_form_in_codes_has_its_block_measured(settings: ScoreSettings) -> None:
    tried = {form.activation_block for unit in UNITS for form in method_of(settings).forms(unit)}
    assert tried - {None} == set(blocks(settings))


def test_acip_tries_its_own_forms_for_linear_units_alone() -> None:
    curvature, acip = (labels_tried(method_of(ScoreSettings(acip=chosen))) for chosen in (None, QUICK_ACIP))
    assert {label for label in curvature if not label.startswith("linear")} == {
        label for label in acip if not label.startswith("linear")
    }
    assert set(curvature) != set(acip)


def test_acip_refuses_a_stop_ratio_that_its_adapters_exceed() -> None:
    narrow = Unit(name="narrow", kind="linear", rows=16, cols=16, matrix="narrow")
    with pytest.raises(UsageError, match="cannot be reached"):
        method_of(ScoreSettings(acip=QUICK_ACIP)).check([narrow])
    method_of(ScoreSettings()).check([narrow])
