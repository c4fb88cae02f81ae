"""What a load would cost, take and emit on a fleet: traces through the gateway's own stages, in virtual time."""
