"""From study and run store to tables; no torch, no ray."""
