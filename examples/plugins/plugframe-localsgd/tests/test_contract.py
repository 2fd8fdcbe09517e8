"""Run the contract suite of plugframe's strategy plugins."""

from plugframe.testing import StrategyContract


class TestLocalSGD(StrategyContract):
    spec = "local_sgd"


class TestDiLoCo(StrategyContract):
    spec = "diloco"
