"""Nothing is drawn that is not looked at."""

from support.figures import leave_undrawn

leave_undrawn()
