"""What runs in the sandbox, bound there as /opt/caravan. Programs, not modules: no worker imports them."""
