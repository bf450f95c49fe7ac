"""How fast the engine is: models of real size, what they take, and the least that they could take."""
