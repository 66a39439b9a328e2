"""The Python API: the pipeline's stages as methods of recipes and runs, for programs and notebooks.

`apprentice/__init__.py` lists the public names. Each calls the stage that the command of the same name calls.

    interactive_recipe   `apprentice.Recipe`: load, check, preview, prepare, train, evaluate
    interactive_run      `apprentice.Run`: open, metrics, evaluate, predict, serve, export
    functions            bare models, comparison, the list of runs
    training_process     handle of a training that runs in a process of its own
    training_child       that process
"""
