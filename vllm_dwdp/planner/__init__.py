"""Does DWDP pay off? A cost model of one MoE layer, and what follows from it. Imports no torch.

Every figure says where it comes from: `spec` (a data sheet), `default` (a guess that was published or
measured elsewhere), `calibrated` (measured on the user's machine), `part default` (both, or calibrated
and an assumption, which is printed).
"""
