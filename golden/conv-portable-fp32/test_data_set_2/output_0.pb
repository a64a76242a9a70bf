
BPlus214_Output_0J(¿œëÂ¦|2Â™‰ÂÔBï!,Â¢M(CÑ¥ÀX‹:Áqn	Â‡H“B