
BPlus214_Output_0J(ôº7½1Qÿ;qx‹=oµõ<‡q¾•>lrb½¯FJ½
±¬=Åe_½