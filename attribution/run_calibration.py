"""What a run's calibration bank told: group Newton's factors, weights, and who predicts best."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from attribution.combined import Weights
from attribution.newton import Calibration
from stores import Where, read_file, write_file

SCHEMA = 3


@dataclass(frozen=True)
class RunCalibration:
    """Calibration of a run's predictors.

    Args:
        newton: of group Newton.
        weights: of the residual predictor, or of group Newton where there is none, and of the
            datamodel, by kind of row; empty without a datamodel.
        errors: each predictor's squared error over the squared change, averaged over forget sets,
            outputs and margins, and kinds of row; the noise of the retrained models is in it, alike
            for all. Factors of a predictor's mean are fitted to the other forget sets each time;
            that a sum grows at all, and how many rows change together, is decided by all of them.
        residual: weights of group Newton and of the datamodel of what it misses, by kind of row;
            empty where there is none.
        linear: weights of the datamodel and of TRAK scores, by kind of row; empty without them.

    Example:
        >>> import tempfile
        >>> factors = {"forget": 1.1, "retain": 0.8, "test": 0.9}
        >>> newton = Calibration(0.72, 1.4, factors, factors, factors, forget_sets=20)
        >>> found = RunCalibration(newton, {}, {"newton": 0.2})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found.save(f"{folder}/calibration.json")
        ...     RunCalibration.load(f"{folder}/calibration.json") == found
        True
    """

    newton: Calibration
    weights: Mapping[str, Weights]
    errors: Mapping[str, float]
    residual: Mapping[str, Weights] = field(default_factory=dict)
    linear: Mapping[str, Weights] = field(default_factory=dict)

    def save(self, path: Where) -> None:
        """Writes it as JSON.

        Args:
            path: the file; it is replaced as a whole.
        """
        text = json.dumps({"schema": SCHEMA} | asdict(self), indent=2) + "\n"
        write_file(path, text.encode())

    @classmethod
    def load(cls, path: Where) -> "RunCalibration":
        """Reads what `save` wrote.

        Args:
            path: the file.

        Returns:
            The calibration.

        Raises:
            ValueError: it cannot be read, or is of another schema.
        """
        try:
            told = json.loads(read_file(path))
            if told["schema"] != SCHEMA:
                raise ValueError(f"its schema is {told['schema']}, this version reads {SCHEMA}")
            weights, residual, linear = (
                {kind: Weights(**values) for kind, values in told[name].items()}
                for name in ("weights", "residual", "linear")
            )
            newton, errors = Calibration(**told["newton"]), dict(told["errors"])
            return cls(newton, weights, errors, residual, linear)
        except ConnectionError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cannot read the calibration {str(path)!r}: {error}; remove it, and"
                " dmm precompute makes it again"
            ) from error
