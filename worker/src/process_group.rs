//! Child processes that end with their run, whatever happens to the worker.
