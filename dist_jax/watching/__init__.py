"""A run as others see it: services, traces, and an end if it hangs."""
