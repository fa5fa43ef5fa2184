"""Records in another codec, for tiers below memory: smaller on the way down, as they were on the way up.

``pairs`` says which codecs become which, and what a header tells of it; it is light, so that settings and a server that
transcodes nothing may import it. ``records`` does it, and loads kernels and compressors: import it where a pair is
configured. Pure functions of records; what is stored where is decided elsewhere. The page is ``docs/transcoding.md``.
"""
