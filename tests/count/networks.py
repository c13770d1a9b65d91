"""Small networks that several tests count."""

from torch import nn


class CellLoop(nn.Module):
    """A recurrent cell (6 inputs, 5 units) called once per step."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(6, 5)

    def forward(self, x):
        state = None
        for step in x:
            state = self.cell(step, state)
        return state


class Asks(nn.Module):
    """An encoder layer, an LSTM, a convolution; `ask` makes it look at a value on the way."""

    def __init__(self, ask, dropout):
        super().__init__()
        self.ask = ask
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=dropout)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.conv = nn.Conv1d(8, 4, 3)

    def forward(self, x):
        y = self.lstm(self.layer(x))[0]
        if self.ask:
            bool(y.isnan().any())
        return self.conv(y.transpose(1, 2).contiguous())
