"""A hook that runs once for each step that an optimizer really takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.optim import Optimizer

from .non_finite import drop_gradients
from .optimizers import restore_options

__all__ = ["StepHook"]


class StepHook:
    """Runs a function after each step that an optimizer really took.

    This hook replaces ``step`` on the instance, and ignores steps with ``found_inf`` set. That counts real steps in all
    cases: ``Optimizer.register_step_post_hook`` also fires for steps that a GradScaler skips inside a fused kernel, and
    twice for subclasses that call ``super().step``, and per-batch callbacks count micro-batches.

    Args:
        optimizer: Its ``step`` is wrapped until :meth:`remove`.
        function: Called without arguments after each real step.
        before: Called before every step, even if a scaler skips that step.
        usable: Called once the gradients exist (after the closure, if there is one). If it returns ``False``, the step
            is not taken.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        function: Callable[[], None],
        before: Callable[[], None] | None = None,
        usable: Callable[[], bool] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._function: Callable[[], None] | None = function
        self._before = before
        self._usable = usable
        self._previous = optimizer.__dict__.get("step")  # None: the class's own
        original = optimizer.step

        @functools.wraps(original)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            restore_options(optimizer)
            if hook._before is not None:
                hook._before()
            closure: Any = args[0] if args else kwargs.get("closure")
            taken = True

            def judged() -> Any:
                """Call the closure; drop the gradients if they are not usable, so that the step changes nothing."""
                nonlocal taken
                loss = closure()
                taken = hook._usable is None or hook._usable()
                if not taken:
                    drop_gradients(optimizer)
                return loss

            if closure is None:
                if hook._usable is not None and not hook._usable():
                    return None
            elif args:
                args = (judged, *args[1:])
            else:
                kwargs["closure"] = judged
            result = original(*args, **kwargs)
            found_inf = getattr(optimizer, "found_inf", None)
            if taken and hook._function is not None and (found_inf is None or not float(found_inf)):
                hook._function()
            return result

        hook = self
        # A bound method: a scheduler made later wraps ``step.__func__``.
        self._step = MethodType(step, optimizer)
        optimizer.step = self._step  # type: ignore[method-assign]  # on the instance: see above

    def remove(self) -> None:
        """Stop calling the functions, and restore the optimizer's ``step`` unless other code has replaced it since."""
        self._function = self._before = self._usable = None
        if self.optimizer.__dict__.get("step") is not self._step:
            return
        if self._previous is None:
            del self.optimizer.step
        else:
            self.optimizer.step = self._previous  # type: ignore[method-assign]  # the instance alone
