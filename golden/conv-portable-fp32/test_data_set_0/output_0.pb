
BPlus214_Output_0J(ØfÀ _·¿E0­¿é¸s@ sÀ&–»@Î¨¿šPy¿Ğ¼…¿6HQ@