
BPlus214_Output_0J(.q¯À5Ú?Wtú¿ßHzÀb¨G@!ì?vÈ’?Ø P¿•vÄ?¤¾.?