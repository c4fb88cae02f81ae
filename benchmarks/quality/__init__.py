"""Evaluations on public data: how good the answers of the parts are, beside published figures."""
