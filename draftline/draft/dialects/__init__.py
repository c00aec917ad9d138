"""Draft checkpoints as different projects write them.

.. code-block:: text

    files.py        a folder's config.json and safetensors, as they are
    model.py        what every dialect is read into, and its checks
    deepspec.py     read and write: DeepSpec's layout, which is Draftline's own
    speculators.py  read and write: speculators' layout, which vLLM serves
    nested.py       read: SpecForge's and Model-Optimizer's layouts
    registry.py     which dialect a checkpoint is in

A dialect is a function from files to a :class:`~draftline.draft.dialects.model.DraftModel`
and, where it is written too, a function back. All translate to DeepSpec's names.
"""
