"""Every private vLLM name and every patch, in one place.

`docs/compat.md` is the ledger: what is touched, why, and when it can go. `tests/compat` holds one
contract test per symbol, so an upgrade of vLLM that moves one fails there, by name.
"""
