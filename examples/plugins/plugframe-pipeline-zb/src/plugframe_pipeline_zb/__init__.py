"""A zero-bubble schedule with one stage per rank, for plugframe's strategy `pipeline`."""

from plugframe_pipeline_zb.schedule import ZeroBubbleH1

__all__ = ["ZeroBubbleH1"]
