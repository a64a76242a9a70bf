
BPlus214_Output_0J(/รPฅ>BSAัย$zรCโฺ2BํcB0ฃย`‘\BไAทA