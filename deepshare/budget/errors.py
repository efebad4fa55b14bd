"""What goes wrong with budgets."""


class BudgetError(ValueError):
    """A budget that cannot be met, or weights that do not fit the plan."""
