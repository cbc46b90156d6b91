"""The steps from a shard of audio to a Parquet file of tags.

In the order in which a clip meets them: `shards` (what to read), `read`, `decode`,
`chunk`, `score`, `write`; `annotate` joins them for one shard and for Beam. They reach
files through `storage` and publish through `output`; `tag` offers the same steps to other
Beam pipelines. Only `annotate` and `tag` import Beam.
"""
