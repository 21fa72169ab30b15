"""The cache on disk: teacher logits in Parquet, readable by anyone who has numpy and pyarrow.

FORMAT.md beside this file is the norm; the modules are its implementation.

    schema     what a row is: the columns, the status codes, `CacheRow`
    manifest   the identity and the plan of a cache, its fingerprint
    record     what is known of a committed shard, the seal, the ledgers
    codec      logits and ids to integers and back
    table      rows to Arrow tables and back
    check      the invariants of a row, for the writer and for `verify`
    bounds     how large the parts of a data file can be
    pages      footers and page headers, checked before pyarrow believes them
    shard      one Parquet file: encoding, and reading that never trusts the disk
    atomic     durable writes: all of a file or nothing of it
    layout     every name inside a cache
    store      where a cache lies: `folder`, on a disk, or `objects`, in an object store; `copies` of its data files
    claims     hints that keep two processes off one shard
    writer     `CacheWriter`, called by stage 1
    reader     `CacheReader`, called by stages 2 and 3
    verify     `verify`, every byte and every invariant; `repair` sets aside what is bad
    show       one example, for people

Run `python -m cache_schema verify DIR` or `python -m cache_schema show DIR`.
"""
