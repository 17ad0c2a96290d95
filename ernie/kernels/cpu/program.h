// Calls of the C interface that can be recorded and made again; see program.py.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

template <class T>
static T of_word(int64_t word) {  // an argument was put into the first bytes of its word
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}
template <class... Arguments, size_t... I>
static void call(void (*function)(Arguments...), const int64_t *words, std::index_sequence<I...>) {
    function(of_word<Arguments>(words[I])...);
}
template <class... Arguments>
static void call(void (*function)(Arguments...), const int64_t *words) {
    call(function, words, std::index_sequence_for<Arguments...>{});
}

// Behind the definition of ernie_NAME: offers ernie_NAME_again, which takes its arguments as words.
#define ERNIE_RECORDABLE(name) \
    extern "C" void ernie_##name##_again(const int64_t *words) { call(ernie_##name, words); }
