"""The contract every plugframe strategy keeps, checked over these."""

from plugframe.testing import StrategyContract


class TestLocalSGD(StrategyContract):
    spec = "local_sgd"


class TestDiLoCo(StrategyContract):
    spec = "diloco"
