"""Every knob once, checked when it is set.  No torch."""
