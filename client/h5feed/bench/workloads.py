"""Training workloads of MLPerf Storage: what each reads, and how fast. Loads nothing: the server uses it, too."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLES = "samples"
"""The field with the data of a workload."""


@dataclass(frozen=True)
class Workload:
    """A training workload of MLPerf Storage on one kind of accelerator.

    Attributes
    ----------
    name, version, accelerator : str
        ``retinanet``, ``v3.0``, ``B200``.
    sample_bytes, spread : float
        Mean and standard deviation of the size of a sample, in bytes.
    batch_size : int
        Samples per step of one accelerator.
    step : float
        Seconds that a step takes.
    utilisation : float
        The least accelerator utilisation (0 to 1) that passes.
    source : str
        The file of github.com/mlcommons/storage with these values, and its commit.
    """

    name: str
    version: str
    accelerator: str
    sample_bytes: float
    spread: float
    batch_size: int
    step: float
    utilisation: float
    source: str

    @property
    def bytes_per_second(self) -> float:
        """What one accelerator reads if it never waits."""
        return self.batch_size * self.sample_bytes / self.step


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="retinanet",
            version="v3.0",
            accelerator="B200",
            sample_bytes=322_957,
            spread=0,
            batch_size=24,
            step=0.04755,
            utilisation=0.85,
            source="configs/dlio/workload/retinanet_b200.yaml at 11460d004cc3127ba943a79cdc6fa0d9339eb7f8",
        ),
        Workload(
            name="unet3d",
            version="v3.0",
            accelerator="B200",
            sample_bytes=146_600_628,
            spread=68_341_808,
            batch_size=7,
            step=0.162,
            utilisation=0.9,
            source="configs/dlio/workload/unet3d_b200.yaml at 0d75b41708cf30b991186aa58c53890cb3b7956e",
        ),
        Workload(
            name="resnet50",
            version="v2.0",
            accelerator="H100",
            sample_bytes=114_660.07,
            spread=0,
            batch_size=400,
            step=0.224,
            utilisation=0.9,
            source="configs/dlio/workload/resnet50_h100.yaml at cb7fa48dfdfa4213dde2ed9ce7cb7d058a84186b",
        ),
        Workload(
            name="cosmoflow",
            version="v2.0",
            accelerator="H100",
            sample_bytes=2_828_486,
            spread=71_311,
            batch_size=1,
            step=0.0035,
            utilisation=0.7,
            source="configs/dlio/workload/cosmoflow_h100.yaml at cb7fa48dfdfa4213dde2ed9ce7cb7d058a84186b",
        ),
    )
}
"""The v3.0 workloads for training, and those of v2.0 that v3.0 has dropped."""
