"""placeholder"""

from pathlib import Path

from qlip.models.measured import MeasuredModel, MeasuredQLIP
from qlip.models.qlip.loading import load_model, load_processor


def open_measured(source: str | Path) -> MeasuredModel:
    """A model."""
    return MeasuredQLIP(load_model(Path(source)), load_processor(Path(source)))
