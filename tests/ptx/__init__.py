"""A GPU without a GPU: compiled PTX is run by NumPy, where a driver would have handed it to a device.

- `parsing` takes the text apart, `arithmetic` says what each form of instruction computes, and `translating`
  makes a Python function of each basic block.
- `memory` is a device's and a block's, to the byte; `scheduling` runs a launch, and `ordering` looks for
  accesses that nothing puts in order.
- `driver` stands in the place of NVIDIA's driver, under the package's own host code, and `queues` are its
  streams'; `library` keeps compiled kernels, `arrays` are what tests hand to the package, and `coverage` says
  which blocks of code never ran.
"""
