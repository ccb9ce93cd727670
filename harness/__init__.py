"""What every script needs and no paper defines: networks, loading, data, images, runs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where teachers/ lies and git describes the code
