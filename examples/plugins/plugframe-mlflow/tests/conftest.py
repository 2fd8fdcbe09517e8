"""Settings of MLflow for tests: no network."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
