-- What came of an attempt: delivered, to be tried again, or dead.
-- KEYS  1 session hash, 2 log stream, 3 content hash, 4 origins zset, 5 owed zset, 6 dead zset
-- ARGV  1 id, 2 attempt, 3 'delivered' | 'retry' | 'dead', 4 ms until the next attempt, 5 '1' if it may have arrived all the
--       same, 6 the last answer in a few words, 7 seconds of replay, 8 seconds to keep a dead letter, 9 seconds to keep a tombstone,
--       10 '1' if n8n says that the execution is running, 11 the attempt as a line of the history, or ''
-- gives 1 if it was taken, 0 if the attempt is not the current one
-- Atomic: state of the callback, its next deadline and the time to live of the keys belong together. Idempotent: 'delivered'
-- always wins, and what is delivered stays as it is; the others need the number of the current, still open attempt.
local s = redis.call('HMGET', KEYS[1], 'callback', 'attempt', 'open', 'origin', 'history')
if not s[1] then
  return 0
end
local outcome = ARGV[3]
if s[1] == 'delivered' then
  return outcome == 'delivered' and 1 or 0
end
if outcome ~= 'delivered' and (s[1] ~= 'owed' or s[2] ~= ARGV[2] or s[3] ~= '1') then
  return 0
end
redis.call('HSET', KEYS[1], 'open', '0', 'last_answer', ARGV[6])
if ARGV[5] == '1' then
  redis.call('HSET', KEYS[1], 'ambiguous', '1')
end
local now = now_ms()
if ARGV[11] ~= '' then
  redis.call('HSET', KEYS[1], 'history', shortened((s[5] or '') .. ARGV[11] .. '\n'))
end
if ARGV[10] == '1' then
  redis.call('HSETNX', KEYS[1], 'running_since', now)
else
  redis.call('HDEL', KEYS[1], 'running_since')
end
if outcome == 'retry' then
  owe(KEYS[4], s[4], ARGV[1], now + ARGV[4])
  return 1
end
unowe(KEYS[4], s[4], ARGV[1])
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('HSET', KEYS[1], 'callback', outcome, 'settled_at', now)
if outcome == 'delivered' then
  -- Prompt, answer and resumeUrl go when the replay is over; what stays is the tombstone: that it was, and how it ended.
  redis.call('ZREM', KEYS[6], ARGV[1])
  redis.call('EXPIRE', KEYS[1], ARGV[7] + ARGV[9])
  redis.call('EXPIRE', KEYS[2], ARGV[7])
  redis.call('EXPIRE', KEYS[3], ARGV[7])
else
  redis.call('ZADD', KEYS[6], now, ARGV[1])
  redis.call('ZREMRANGEBYSCORE', KEYS[6], '-inf', now - ARGV[8] * 1000)
  redis.call('EXPIRE', KEYS[1], ARGV[8])
  redis.call('EXPIRE', KEYS[2], ARGV[7])
  redis.call('EXPIRE', KEYS[3], ARGV[8])
end
return 1
