
BPlus214_Output_0J(%ŽëÂa2ÂG±‰ÂG`ÔB¢´+ÂXH(CºŠ¤À&o9Á¿œ	Â£B“B