"""What a map's content depends on besides the model and the text: the settings it was scored with.

`map.json` holds them and the command line makes them, so they need nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from packager.errors import UsageError

PUBLISHED_STEPS = 2000
BASES = ("curvature", "weights")
QUICK_TOKENS = 4096
_RETIRED = {"sampled_labels": False}
"""Settings that maps of earlier versions name, with the only value under which today's scoring does the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What a device multiplies by: floats as its graph holds them ("f32" or "f16"), and codes of few bits or not.

    `rounds_inputs`: whether the kernels for codes round what they multiply to 8 bits, as those for CPUs do.
    """

    floats: str = "f32"
    low_bit: bool = True
    rounds_inputs: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AcipSettings:
    """As published, but for `basis`: "curvature" starts from the decomposition under G and H, "weights" from W's own.

    `steps` are those the schedule is laid over: with fewer than 2,000, masks move and λ grows so much faster per step.
    `step_tokens` go into an optimiser step, `tuning_steps` follow the pruning. `stop_ratio` is the share of the layers'
    elements at which pruning stops, adapters counted. `adapter_scale` is LoRA's alpha over rank. UsageError for values
    that make no sense.
    """

    basis: str = "curvature"
    stop_ratio: float = 0.4
    steps: int = PUBLISHED_STEPS
    step_tokens: int = 4096
    tuning_steps: int = 1000
    adapter_rank: int = 32
    adapter_scale: float = 0.5
    adapter_rate: float = 5e-5
    dropout: float = 0.05
    mask_rate: float = 5e-5
    first_penalty: float = 1e-3
    growth: float = 1.01
    growth_every: int = 4

    def __post_init__(self) -> None:
        least = {"steps": 1, "step_tokens": 2, "tuning_steps": 0, "adapter_rank": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"ACIP's {name} is {getattr(self, name)}: expected at least {value}")
        if not 0 < self.stop_ratio < 1:
            raise UsageError(f"ACIP's stop ratio is {self.stop_ratio}: expected a share between 0 and 1")
        if self.basis not in BASES:
            raise UsageError(f"ACIP's basis is {self.basis!r}: expected one of {', '.join(BASES)}")

    @property
    def speed(self) -> float:
        """How much faster than published everything moves per step."""
        return PUBLISHED_STEPS / self.steps


QUICK_ACIP = AcipSettings(steps=80, step_tokens=256, tuning_steps=40, adapter_rank=8, adapter_rate=5e-4)
"""For two cores: fewer and smaller steps, masks 25 times and adapters 10 times as fast, a smaller adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSettings:
    """`tokens` of calibration, a `seed`, and what the options may be.

    `quick` tries fewer forms and measures less. `provider` is the execution provider of the graph, `float_only` is for
    devices without low-bit kernels. `acip` scores by that method; without, by curvature.
    """

    tokens: int = 32768
    seed: int = 0
    quick: bool = False
    provider: str = "cpu"
    float_only: bool = False
    acip: AcipSettings | None = None

    @property
    def kernels(self) -> Kernels:
        """What the options may be made of. Graphs for accelerators hold float16, and only CPUs' kernels round
        inputs."""
        cpu = self.provider == "cpu"
        return Kernels(floats="f32" if cpu else "f16", low_bit=not self.float_only, rounds_inputs=cpu)

    def differences(self, wanted: ScoreSettings) -> list[str]:
        """One phrase for each setting, by name, that is not as in `wanted`."""
        found, other = asdict(self), asdict(wanted)
        return [
            f"{name} {found[name]!r} in place of {other[name]!r}"
            for name in sorted(found)
            if found[name] != other[name]
        ]


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `map.json` holds them, without those that earlier versions had and none of their maps ever used. One
    with another value stays, for the reader to refuse."""
    return {name: value for name, value in settings.items() if name not in _RETIRED or value is not _RETIRED[name]}
