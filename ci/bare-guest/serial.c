// SPDX-License-Identifier: Apache-2.0 OR MIT

// The first serial port.

#include "guest.h"

#define DATA 0x3f8
#define INTERRUPTS (DATA + 1)
#define FIFO (DATA + 2)
#define LINE (DATA + 3)
#define STATUS (DATA + 5)

void start_serial(void)
{
    out8(LINE, 0x80);
    out8(DATA, 1);
    out8(INTERRUPTS, 0);
    out8(LINE, 3);
    // Turns the buffers on, and empties them.
    out8(FIFO, 7);
}

static void put(char c)
{
    while (!(in8(STATUS) & 0x20))
        ;
    out8(DATA, c);
}

void say(const char *text)
{
    while (*text)
        put(*text++);
}

void say_number(uint64_t number)
{
    say(" 0x");
    int shift = 60;
    while (shift && !(number >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[number >> shift & 15]);
}

void hear(char *line, uint32_t size)
{
    uint32_t length = 0;
    for (;;) {
        while (!(in8(STATUS) & 1))
            ;
        char c = in8(DATA);
        if (c == '\n' && length)
            break;
        if (c != '\n' && length < size - 1)
            line[length++] = c;
    }
    line[length] = 0;
}
