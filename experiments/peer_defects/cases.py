"""All cases, in the order of their numbers."""

from array_cases import ARRAY_CASES
from calibration_cases import CALIBRATION_CASES
from model_cases import MODEL_CASES
from verdict import Case

CASES: dict[int, Case] = {
    case.number: case
    for case in sorted(
        (*MODEL_CASES, *CALIBRATION_CASES, *ARRAY_CASES), key=lambda case: case.number
    )
}
