"""What cells will read, need and take, said before anything heavy is done.

`preflight=true` runs this instead of the cells. Nothing is downloaded, loaded or hashed: sizes come
from the disk, from the hub's list of files, or, where neither is within reach, from the published
shape of the model; memory and hours are estimates from that shape and a probe of two layers.
"""
