"""OpenLoRA: many LoRA adapters served from one base model, in one batch.

This room knows torch, transformers and files; it may not touch Ray, HTTP or the ledger's state.
Read in this order: `adapter` (a PEFT folder becomes tensors, or is refused), `slots` (where an
adapter lives), `layers` and `forms` (the arithmetic), `kv` (keys and values per row), `prefixes`
(beginnings that are read once), `scheduler` (who is next), `rows`, `forward` and `batch` (the
model's work of a step), `memory` (when it runs out), `sampling` and `text` (logits to words),
`requests` and `engine` (one iteration), `driver` (asyncio).

Base models: causal language models of transformers 5 whose layers are attention over all positions
of the window. Seen to give peft's greedy tokens, with adapters of mixed ranks on all linears and
rows of the base in one batch: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3, GPT-2, GPT-J,
GPT-NeoX, Phi, Phi-3, OPT, Falcon (rotary), MPT, gpt-oss, Mixtral (attention linears), and by hand
CodeGen, GPTBigCode, StableLM, StarCoder2, Cohere, OLMo2, Granite, SmolLM3, GLM-4. Refused when the
engine is made: Bloom and Falcon with ALiBi, Mamba and other recurrent layers, chunked attention
(Llama 4), and sliding or local windows, or position scaling, that begin below `max_len`. A family
that is named nowhere shows at start what it computes (`selfcheck`), and is served or refused by it.

After S-LoRA (arXiv:2311.03285) and Punica (arXiv:2310.18547): batch rows of different adapters,
move the adapters and not the requests.
"""
