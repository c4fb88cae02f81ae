"""Ask an Ondol site with the official OpenAI client, and see where each answer came from.

pip install openai
export ONDOL_URL=http://127.0.0.1:8080/v1 ONDOL_API_KEY=…      # `ondol up` prints both
python examples/ask.py
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("ONDOL_URL", "http://127.0.0.1:8080/v1"), api_key=os.environ["ONDOL_API_KEY"]
)
question = [{"role": "user", "content": "What is the capital of South Korea?"}]

# Nothing but the address changes.  What Ondol says of an answer is in the reply's headers.
reply = client.chat.completions.with_raw_response.create(model="assistant", messages=question)
print(reply.parse().choices[0].message.content)
for name in ("site", "reason", "cache", "cost", "energy-j", "carbon-g"):
    print(f"  {name}: {reply.headers.get(f'x-ondol-{name}', '-')}")

# Hints are headers, too: how sensitive the question is, and what matters most.
private = client.chat.completions.with_raw_response.create(
    model="assistant", messages=question, extra_headers={"x-ondol-data-class": "confidential"}
)
print("confidential:", private.headers["x-ondol-site"])
best = client.chat.completions.with_raw_response.create(
    model="assistant", messages=question, extra_headers={"x-ondol-objective": "best"}
)
print("best:", best.headers["x-ondol-site"])

# Of a stream, cost and energy are known at its end: they are in the last chunk, in the field `ondol`.
stream = client.chat.completions.create(model="assistant", messages=question, stream=True)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
    account = (chunk.model_extra or {}).get("ondol")
    if account is not None:
        print(f"\n  {account['site']}, cache {account['cache']}, {account['cost']}")

# Embeddings work alike.
vectors = client.embeddings.create(
    model="embedding", input=["온돌은 따뜻하다", "The floor is warm"], encoding_format="float"
)
print(f"embeddings: {len(vectors.data)} vectors of {len(vectors.data[0].embedding)} numbers")
