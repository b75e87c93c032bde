"""What all tests share: subprocesses and Ray workers import the checkout, installed or not."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT / "models")])
