"""The base class of extensions."""

from __future__ import annotations


class Extension:
    """Wrap any hook with ``@hookimpl(wrapper=True)``, or implement the ``on_…`` hooks with ``@hookimpl``.

    ::

        class Timer(Extension):
            @hookimpl(wrapper=True)
            def strategy_backward(self):
                start = time.perf_counter()
                result = yield
                print(time.perf_counter() - start)
                return result
    """
