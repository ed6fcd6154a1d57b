"""vLLM generates with moegate's routers: `MOEGATE=1 python vllm_generate.py FOLDER`, and the same without MOEGATE."""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,  # the tiny checkpoint has no tokenizer, of which vLLM warns at length
        max_model_len=256,
        block_size=32,
        enforce_eager=True,  # moegate leaves the layers to vLLM where torch.compile looks into them, on a CPU
    )
    options = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [11, 42, 7, 99, 3]}], options)
    print(output.outputs[0].token_ids)  # the log has the line "moegate routes 3 of 3 MoE layers"
