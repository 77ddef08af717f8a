"""Checkpoints in and out, without tensor arithmetic.

In: `checkpoint.open_checkpoint` reads headers only and refuses what is damaged or hostile.
Out: `layout.make_layout` says where every byte will lie, and `folder.OutFolder` lets the files appear together at the
end, or not at all.
"""
