"""moegate inside the engines: one module an engine, each off until it is asked for."""
