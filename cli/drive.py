"""`alpacache drive`: a recording played with predicted paths, as a film."""

from alpacache.driver.config import DriveConfig

from . import output
from .options import from_config


@from_config(
    DriveConfig,
    panels={
        "Film": "clip begin seconds every",
        "Models": "checkpoint ema vlm",
        "Prediction": "paths flow_steps seed",
        "Machine": "memory_budget device",
    },
)
def drive(config: DriveConfig, json: bool) -> None:
    """Play a recording with the paths a model predicts at every moment, base beside trained: a film to send around.

    Example: `alpacache drive folder:my_drives --model nvidia/Alpamayo-R1-10B --checkpoint runs/one --out drive.mp4`
    """
    with output.show_progress("drive") as on_progress:
        from alpacache.driver.film import drive as run

        report = run(config, on_progress=on_progress)
    if not report.shown_paths:
        output.note("the source has no calibration of the camera that is shown: paths are drawn from above alone.")
    resumed = f", {report.resumed} of them predicted before" if report.resumed else ""
    left_out = f", {report.left_out} moments left out" if report.left_out else ""
    lines = {
        "film": f"{report.out}: {report.pictures} pictures{resumed}{left_out}",
        "recording": report.clip,
        "models": ", ".join(report.models),
    }
    output.print_result(report, config.out, lines, as_json=json)
