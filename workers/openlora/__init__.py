"""OpenLoRA: many LoRA adapters served from one base model, in one batch.

This room knows torch, transformers and files; it may not touch Ray, HTTP or the ledger's state.
Read in this order: `adapter` (a PEFT folder becomes tensors, or is refused), `slots` (where an
adapter lives), `layers` (the arithmetic), `kv` (keys and values per row), `scheduler` (who is
next), `sampling` and `text` (logits to words), `engine` (one iteration), `driver` (asyncio).

After S-LoRA (arXiv:2311.03285) and Punica (arXiv:2310.18547): batch rows of different adapters,
move the adapters and not the requests.
"""
