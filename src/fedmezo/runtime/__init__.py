"""Running an algorithm: the bytes on the wire, the journal on disk, the loop between them."""
